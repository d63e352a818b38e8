//! Nodes that join each other over real QUIC on loopback, and peers that mean harm.

mod between;
mod carried;
mod cli;
mod hostile;
mod joining;
mod liars;
mod planes;
mod raw;
mod support;
