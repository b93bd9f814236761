"""What is an array, and where is its memory?"""
