"""x"""

gpu = None
