"""Which tasks are there?"""
