from dataclasses import dataclass
@dataclass
class BenchOps:
    quick: bool=False
    def run(self): pass
@dataclass
class BenchScaling:
    def run(self): pass
