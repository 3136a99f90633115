"""What both sides read and write: messages, the pipe's ends, the slot's memory."""
