"""What users declare: plain data, validated at decoration. Every process loads it."""
