"""What the label formats share: class lists, split lists, shapes, mask encodings."""
