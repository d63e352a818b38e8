//! Inputs as products with float weights read them.

use crate::pool::ThreadPool;

/// Inputs of a step, one element for each unit: a column, or a pair of them. Up to [`DIRECT_TOKENS`]
/// tokens lie one after another, `[tokens][units]`; more of them in tiles of [`TILE`] tokens with the
/// tokens side by side, `[tile][units][TILE]`, so that a tile reads one stream and not twelve that
/// fall into the same set of the cache.
#[derive(Debug, Default)]
pub(crate) struct Tiles<T> {
    elements: Vec<T>,
    tokens: usize,
    units: usize,
    made: bool,
}

/// Where a kernel finds the inputs of some tokens.
#[derive(Clone, Copy)]
pub(crate) struct Tile<T> {
    /// The first unit of the first token.
    pub first: *const T,
    /// From one token to the next.
    pub next_token: usize,
    /// From one unit to the next.
    pub next_unit: usize,
}

impl<T: Copy + Default + Send> Tiles<T> {
    /// The values have changed.
    pub fn clear(&mut self) {
        self.made = false;
    }

    /// Makes the elements, if the values changed since. `convert` makes those of a few columns, an even
    /// number of them but for the last.
    pub fn make(
        &mut self,
        pool: &ThreadPool,
        values: &[f32],
        cols: usize,
        units: usize,
        convert: impl Fn(&[f32], &mut [T]) + Sync,
    ) {
        if self.made || cols == 0 {
            return;
        }
        let tokens = values.len() / cols;
        (self.tokens, self.units, self.made) = (tokens, units, true);
        let tile = if tokens <= DIRECT_TOKENS { 1 } else { TILE };
        let len = tokens.div_ceil(tile) * tile * units;
        if self.elements.len() < len {
            self.elements.resize(len, T::default());
        }
        let (cols_at_once, per_unit) = (64, cols.div_ceil(units));
        pool.run_chunks(&mut self.elements[..len], tile * units, |n, out| {
            let mut some = [T::default(); 64];
            for (t, row) in values[n * tile * cols..].chunks(cols).take(tile).enumerate() {
                for (c, values) in row.chunks(cols_at_once).enumerate() {
                    let some = &mut some[..values.len().div_ceil(per_unit)];
                    convert(values, some);
                    let out = &mut out[c * cols_at_once / per_unit * tile..];
                    for (element, out) in some.iter().zip(out.chunks_exact_mut(tile)) {
                        out[t] = *element;
                    }
                }
            }
        });
    }

    /// The inputs of the tokens `token..`. Tiles begin at multiples of [`TILE`] tokens, unless there
    /// are [`DIRECT_TOKENS`] or fewer.
    pub fn tile(&self, token: usize) -> Tile<T> {
        debug_assert!(self.made);
        if self.tokens <= DIRECT_TOKENS {
            let first = self.elements[token * self.units..].as_ptr();
            return Tile { first, next_token: self.units, next_unit: 1 };
        }
        let at = token / TILE * TILE * self.units + token % TILE;
        Tile { first: self.elements[at..].as_ptr(), next_token: 1, next_unit: TILE }
    }
}

/// Tokens of a tile of float inputs.
pub(crate) const TILE: usize = 12;

/// Up to so many tokens, float inputs lie one token after another.
pub(crate) const DIRECT_TOKENS: usize = 4;
