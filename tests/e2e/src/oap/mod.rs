//! Real `SkyWalking`: its programs, fetched once with Maven and pip, and what its servers say of
//! themselves.

pub mod cache;
pub mod graphql;
pub mod http;
pub mod image;
pub mod segments;
