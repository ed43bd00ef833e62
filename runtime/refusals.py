"""What is said where an engine or a conversation cannot be used any more, or not now."""

CLOSED = "this conversation is closed: make another with engine.session()"
OVERTAKEN = "the conversation went on after this stream was made: make it when the one before it has ended"
GENERATING = "this conversation is generating already: finish or close that stream first"
ENGINE_CLOSED = "this engine is closed: load it again with runtime.load"
