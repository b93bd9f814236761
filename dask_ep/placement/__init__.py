"""Which expert lies where?"""
