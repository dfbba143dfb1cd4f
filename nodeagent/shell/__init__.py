"""Everything of the agent that touches the world: sockets, processes, shared memory, clocks. It carries out what `nodeagent.state` decides."""
