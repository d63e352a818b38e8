//! Progress bars on standard error; silent where that is no terminal.

use indicatif::{ProgressBar, ProgressStyle};

/// A bar for one long piece of work.
pub struct LoadBar(ProgressBar);

impl LoadBar {
    /// Loading the weights of a model.
    pub fn new(model: &str) -> Self {
        let bar = ProgressBar::new(STEPS);
        bar.set_style(style("{prefix:.bold} loading {wide_bar} {percent:>3} %  {elapsed}"));
        bar.set_prefix(model.to_owned());
        LoadBar(bar)
    }

    /// `count` equal pieces.
    pub fn counting(what: &str, count: u64) -> Self {
        let bar = ProgressBar::new(count);
        bar.set_style(style("{prefix:.bold} {wide_bar} {pos}/{len}  {eta}"));
        bar.set_prefix(what.to_owned());
        LoadBar(bar)
    }

    /// `done` is between 0 and 1.
    pub fn set(&self, done: f32) {
        self.0.set_position((done * STEPS as f32) as u64);
    }

    pub fn set_position(&self, position: u64) {
        self.0.set_position(position);
    }

    pub fn clear(&self) {
        self.0.finish_and_clear();
    }
}

fn style(template: &str) -> ProgressStyle {
    let style = ProgressStyle::with_template(template);
    style.unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("━━ ")
}

const STEPS: u64 = 1000;
