//! A whole node over loopback, as its clients see it.

mod common;
mod http;
mod real;
