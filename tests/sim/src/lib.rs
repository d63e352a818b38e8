//! The simulator: Grapevine's machines in a world of virtual time, with faults, from one seed.
//!
//! Owns: the world (event queue, network, clocks, disks), scenarios and random faults, oracles, the
//! transcript and its replay. The machines in it are the ones of the daemon, unchanged. Refuses: real
//! time, sockets, threads; nothing here may make two runs of a seed differ.

pub mod actor;
pub mod clock;
pub mod directory;
pub mod disk;
pub mod fault;
pub mod foca;
pub mod measure;
pub mod net;
pub mod oracle;
pub mod queue;
pub mod quic;
pub mod routing;
pub mod scenario;
pub mod streams;
pub mod transfer;
pub mod vine;
pub mod world;
