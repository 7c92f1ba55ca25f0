"""What anchors lie where on an image: layouts, and the view of a detector that has them."""
