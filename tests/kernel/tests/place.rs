//! Placing: connects to a frontend go to the endpoint that should have them, and what was placed is
//! counted.

mod alone;
mod avoid;
mod clients;
mod counts;
mod drift;
mod hostile;
mod lost;
mod node;
mod order;
mod outlive;
mod overflow;
mod own_address;
