"""From speech ids to text: a step is forward, retrieve, transform, choose."""
