"""PEFT adapter folders: read, checked, attached, written."""
