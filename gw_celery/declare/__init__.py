"""What users declare: pure data, validated when it is written down."""
