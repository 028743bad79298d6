"""What tests share: strategies that draw inputs, and oracles that know the answer."""
