//! Stop strings, also across the borders of tokens.

/// Holds back what may be the beginning of a stop string.
#[derive(Clone, Debug)]
pub(super) struct StopScanner {
    stops: Vec<String>,
    held: String,
}

/// What a piece of text did.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Scan {
    /// This much can be shown.
    Emit(String),
    /// A stop string was met; this much stands before it.
    Stopped(String),
}

impl StopScanner {
    pub fn new(stops: Vec<String>) -> Self {
        StopScanner { stops, held: String::new() }
    }

    pub fn push(&mut self, text: &str) -> Scan {
        if self.stops.is_empty() {
            return Scan::Emit(text.to_owned());
        }
        self.held.push_str(text);
        if let Some(at) = self.stops.iter().filter_map(|s| self.held.find(s.as_str())).min() {
            self.held.truncate(at);
            return Scan::Stopped(std::mem::take(&mut self.held));
        }
        let keep = self.stops.iter().map(|s| overlap(&self.held, s)).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        Scan::Emit(std::mem::replace(&mut self.held, rest))
    }

    /// The text that was held back and turned out to be no stop string.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// Length of the longest end of `text` that is a proper beginning of `stop`.
fn overlap(text: &str, stop: &str) -> usize {
    let longest = text.len().min(stop.len() - 1);
    (1..=longest).rev().find(|&n| text.as_bytes().ends_with(&stop.as_bytes()[..n])).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn run(stops: &[&str], pieces: &[&str]) -> (String, bool) {
        let mut scanner = StopScanner::new(stops.iter().map(|s| s.to_string()).collect());
        let mut shown = String::new();
        for piece in pieces {
            match scanner.push(piece) {
                Scan::Emit(text) => shown.push_str(&text),
                Scan::Stopped(text) => return (shown + &text, true),
            }
        }
        (shown + &scanner.finish(), false)
    }

    #[test]
    fn table() {
        for (stops, pieces, shown, stopped) in [
            (&[][..], &["a", "b"][..], "ab", false),
            (&["END"], &["abc E", "N", "D def"], "abc ", true),
            (&["END"], &["abc E", "N", "X"], "abc ENX", false),
            (&["END"], &["abc EN"], "abc EN", false),
            (&["aab"], &["a", "a", "a", "b"], "a", true),
            (&["xyz", "y"], &["wxy", "z"], "wx", true),
            (&["é"], &["caf", "é!"], "caf", true),
            (&["日本"], &["今日", "本"], "今", true),
        ] {
            assert_eq!(run(stops, pieces), (shown.to_owned(), stopped), "{stops:?} {pieces:?}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]

        #[test]
        fn equals_a_search_in_the_whole(
            pieces in proptest::collection::vec("[abé]{0,4}", 0..8),
            stop in "[abé]{1,3}",
        ) {
            let whole = pieces.concat();
            let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
            let expected = match whole.find(&stop) {
                Some(at) => (whole[..at].to_owned(), true),
                None => (whole.clone(), false),
            };
            prop_assert_eq!(run(&[&stop], &pieces), expected);
        }
    }
}
