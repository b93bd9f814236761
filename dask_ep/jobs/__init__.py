"""How is a job carried out?"""
