"""Write the bodies: cells that run together become one body of grouped and fused operations."""
