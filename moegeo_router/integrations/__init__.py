"""What the library knows of other libraries; none of them is imported here."""
