"""The cache job: tars through the teacher into a store."""
