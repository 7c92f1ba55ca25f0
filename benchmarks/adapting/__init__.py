"""What levels, anchors, input and factors give to a stock detector, on real images."""
