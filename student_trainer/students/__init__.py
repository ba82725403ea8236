"""Students: timm models, their stages, preprocessing."""
