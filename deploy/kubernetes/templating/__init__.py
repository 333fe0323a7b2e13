"""As much of Helm's template language as our chart uses: what it does not know, it refuses by name and line.

The chart is the only description of our Kubernetes objects. Rendering it ourselves, not describing the objects a second
time, is what lets those without Helm have the very same ones; tests compare with Helm's own output.
"""
