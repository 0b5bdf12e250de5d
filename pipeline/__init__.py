"""Files in; checked, chosen and judged. No torch."""
