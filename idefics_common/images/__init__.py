"""From photographs of any kind to `pixel_values`."""
