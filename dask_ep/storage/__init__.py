"""How do arrays come in and go out?"""
