"""What an image is worth: values and which of them are valid, behind one small protocol."""
