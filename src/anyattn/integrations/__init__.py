"""What connects anyattn to other libraries; each part imports its library only when it is used."""
