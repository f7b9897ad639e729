"""The index in Redis: tasks, versions, customizations, API keys; each change is one Lua script."""
