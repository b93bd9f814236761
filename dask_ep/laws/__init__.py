"""What do rows, bytes, memory and time of a run follow from?"""
