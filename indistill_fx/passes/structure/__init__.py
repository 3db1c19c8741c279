"""What a graph is made of: dominators, layers, blocks, stages."""
