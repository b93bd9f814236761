"""What will a run cost, and what did it cost?"""
