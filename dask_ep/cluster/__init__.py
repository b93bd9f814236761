"""Who serves a rank?"""
