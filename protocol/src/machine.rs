//! The one pattern: pure machine, thin shell.

use crate::Instant;

/// Logic without IO. Time and randomness arrive as arguments, effects leave as outputs, so that the
/// same inputs always give the same outputs: in the daemon, in a test and in the simulator.
pub trait Machine {
    type Input;
    type Output;

    /// Advances the machine and appends what the shell must now do to `out`.
    fn handle(&mut self, now: Instant, input: Self::Input, out: &mut Vec<Self::Output>);

    /// When `handle` must next be called with a timer input, if nothing arrives before.
    fn next_deadline(&self) -> Option<Instant>;
}
