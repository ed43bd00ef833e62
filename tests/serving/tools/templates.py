"""Chat templates in the forms of two families, as short as can be."""

HERMES_TEMPLATE = (
    "{% if tools %}<|system|>Functions:{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}\n"
    'Call one so: <tool_call>\n{"name": NAME, "arguments": OBJECT}\n</tool_call><|end|>{% endif %}'
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content or '' }}"
    "{% for call in message.tool_calls or [] %}"
    '\n<tool_call>\n{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n'
    "</tool_call>{% endfor %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
LLAMA_TEMPLATE = (
    "{% if tools %}<|system|>Environment: ipython\nFunctions:{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}\n"
    'Call one so: {"name": function, "parameters": object}<|end|>{% endif %}'
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content or '' }}"
    "{% if message.tool_calls %}"
    "{% if message.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif %}"
    "{% set call = message.tool_calls[0].function %}"
    '{"name": "{{ call.name }}", "parameters": {{ call.arguments | tojson }}}'
    "{% endif %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
NO_TOOLS_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}<|assistant|>"
)
