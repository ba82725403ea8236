"""What a store's features look like and what codecs do to them."""
