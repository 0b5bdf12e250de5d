"""The served model: one bundle's answers over HTTP."""
