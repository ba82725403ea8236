"""The live teacher behind the service."""
