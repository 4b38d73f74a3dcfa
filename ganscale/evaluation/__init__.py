"""How good are a generator's images? Image sets, features across ranks, and every judgement."""
