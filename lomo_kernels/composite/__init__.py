"""What serves a layer's operators if no kernel does: torch's products and our other operators, tile by tile."""
