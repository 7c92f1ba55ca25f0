"""What a user has of ground truth -> image sizes and boxes. Knows no model."""
