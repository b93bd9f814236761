"""What does one rank compute?"""
