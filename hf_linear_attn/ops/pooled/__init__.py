"""Keys and values that are pooled or projected to fewer: Linformer, Nystromformer, Long-Short Transformer."""
