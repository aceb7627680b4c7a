"""The roles and keys of messages that a recipe can map other names to. No torch."""

ROLES = ("system", "developer", "user", "assistant", "tool")

# Keys of data.message_fields.
MESSAGE_FIELDS = ("role", "content", "reasoning_content", "tool_calls", "tool_call_id", "name")

# Values of data.roles: a role, or tool_call for a turn that contains the JSON of a call.
ROLE_TARGETS = (*ROLES, "tool_call")
