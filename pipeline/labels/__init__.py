"""Labels that people give: what to label next, out to label tools and back."""
