"""Learning while the sequence runs: gradients whose memory does not depend on T.

    learner = online.ottt(model)                                        # the same outputs, another rule for the gradient
    value, grads, state = online.gradients(learner, loss, xs)           # takes the steps one after another

`sltt` and `ottt` return a copy of a network whose gradients need no later step. `Eprop` is a layer that carries eligibility traces.
`gradients` runs a network in pieces, adds the gradients of the pieces, and cuts the gradient between them.
"""

from snnfuse.online.eprop import Eprop, EpropState, RandomFeedback
from snnfuse.online.eprop_conv import EpropConv
from snnfuse.online.gradients import Window, gradients
from snnfuse.online.ottt import Traced, TracedRecurrent, ottt
from snnfuse.online.sltt import Instant, sltt

__all__ = ["Eprop", "EpropConv", "EpropState", "Instant", "RandomFeedback", "Traced", "TracedRecurrent", "Window"]
__all__ += ["gradients", "ottt", "sltt"]
