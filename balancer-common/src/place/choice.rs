//! The choice among the endpoints of a group, from counts of other nodes that are seconds old.
//!
//! Water level: `EndpointGroup::level` is the load up to which the connections still to come would
//! fill the endpoints. Each endpoint gets them in proportion to its room below that level. The node
//! draws by its place among the nodes and the number of the draw, not by lot, so that nodes which
//! know the same do not all choose the same. It takes two walks over the endpoints: [`Sum`] adds
//! the rooms up, and [`Draw`] finds whose room the draw falls into.
//!
//! Where nobody has room, more have come than were expected, or nothing is known of other nodes
//! (level 0). The level is then that of the most loaded endpoint: the others catch up with it.
//! Where all are as loaded, each gets its share by weight.
//!
//! A node that has just lost most of its connections goes by its own counts alone for a while
//! ([`OWN_ONLY_NS`]): other nodes will have lost theirs as well, and what is published is no longer
//! true. Those are drawn from that have the fewest of its connections for their weight.

use crate::abi::EndpointGroup;
use crate::opaque;

/// What one endpoint looks like to the choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    /// Connections that this node has placed on it, with those in flight.
    pub own: u64,
    /// Connections that others have placed on it, as far as is known.
    pub others: u64,
    /// Its share beside the others'; 0 gets none.
    pub weight: u64,
    /// Connects to it have failed of late.
    pub avoided: bool,
}

impl Seen {
    /// Its load, in units of [`EndpointGroup::LOAD_ONE`], rounded down: for people.
    pub const fn load(&self) -> u64 {
        let weight = if self.weight == 0 { 1 } else { self.weight };
        self.connections().wrapping_mul(EndpointGroup::LOAD_ONE) / weight
    }

    #[inline(always)]
    const fn connections(&self) -> u64 {
        self.own.wrapping_add(self.others)
    }

    /// Its room below a level, in parts of a connection, of which there are
    /// [`EndpointGroup::LOAD_ONE`].
    #[inline(always)]
    const fn room(&self, level: u64) -> u64 {
        // Not level - load: a load is a division, and 16 of these would take longer than all else.
        level
            .wrapping_mul(self.weight)
            .saturating_sub(self.connections().wrapping_mul(EndpointGroup::LOAD_ONE))
    }
}

/// For how long a node that has lost most of its connections goes by its own counts alone: until
/// clients are back, and counts of them have been published. ns.
pub const OWN_ONLY_NS: u64 = 10_000_000_000;

/// 2³² / golden ratio: multiples of it fill the circle evenly, however many there are.
const GOLDEN: u64 = 0x9E37_79B9;
/// Nodes that were beside each other on the circle are spread over it anew by multiples of this.
const SCATTER: u64 = 32;

/// The first walk, over those that may be chosen: not over avoided ones, unless all are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sum {
    /// Room below the level, in parts of a connection.
    room: u64,
    connections: u64,
    weight: u64,
    /// The most loaded one.
    most_connections: u64,
    most_weight: u64,
    /// Connections of this node.
    own: u64,
    /// The fewest of them for a weight, and the weights of those that have so few.
    fewest: u64,
    fewest_weight: u64,
    fewest_weights: u64,
    /// Those without room below the level, and those as loaded as the most loaded one.
    full: u32,
    most: u32,
    /// All, and those that have the fewest connections of this node.
    number: u32,
    fewest_number: u32,
    /// Those that are avoided.
    avoided: u32,
    /// Whether there are any that are not, and any that are. Flags, because the verifier follows
    /// every value of a counter that is compared with something.
    has_sound: bool,
    has_avoided: bool,
}

impl Sum {
    /// Before the first endpoint.
    pub const EMPTY: Self = Self {
        room: 0,
        connections: 0,
        weight: 0,
        most_connections: 0,
        most_weight: 0,
        own: 0,
        fewest: 0,
        fewest_weight: 0,
        fewest_weights: 0,
        number: 0,
        fewest_number: 0,
        full: 0,
        most: 0,
        avoided: 0,
        has_sound: false,
        has_avoided: false,
    };

    /// Takes one endpoint into account.
    #[inline(always)]
    pub fn add(&mut self, level: u64, seen: &Seen) {
        if seen.weight == 0 {
            return;
        }
        if seen.avoided {
            self.avoided = self.avoided.wrapping_add(1);
            self.has_avoided = true;
            if self.has_sound {
                return;
            }
        } else if !self.has_sound {
            // Those before it were avoided, and are not needed.
            self.has_sound = true;
            let (zero, none) = (opaque(0), opaque(0));
            (self.room, self.connections, self.weight) = (zero, zero, zero);
            (self.most_connections, self.most_weight) = (zero, zero);
            (self.own, self.fewest) = (zero, zero);
            (self.fewest_weight, self.fewest_weights) = (zero, zero);
            (self.full, self.most) = (none, none);
            (self.number, self.fewest_number) = (none, none);
        }
        self.include(level, seen);
        self.include_own(seen);
    }

    #[inline(always)]
    const fn include_own(&mut self, seen: &Seen) {
        self.own = self.own.wrapping_add(seen.own);
        self.number = self.number.wrapping_add(1);
        // Fractions are compared crosswise.
        let this = seen.own.wrapping_mul(self.fewest_weight);
        let fewest = self.fewest.wrapping_mul(seen.weight);
        if self.fewest_weight == 0 || this < fewest {
            (self.fewest, self.fewest_weight) = (seen.own, seen.weight);
            (self.fewest_weights, self.fewest_number) = (seen.weight, 1);
        } else if this == fewest {
            self.fewest_weights = self.fewest_weights.wrapping_add(seen.weight);
            self.fewest_number = self.fewest_number.wrapping_add(1);
        }
    }

    #[inline(always)]
    const fn include(&mut self, level: u64, seen: &Seen) {
        let connections = seen.connections();
        let room = seen.room(level);
        self.room = self.room.wrapping_add(room);
        self.full = self.full.wrapping_add((room == 0) as u32);
        self.connections = self.connections.wrapping_add(connections);
        self.weight = self.weight.wrapping_add(seen.weight);
        // Fractions are compared crosswise.
        let this = connections.wrapping_mul(self.most_weight);
        let most = self.most_connections.wrapping_mul(seen.weight);
        if self.most_weight == 0 || this > most {
            (self.most_connections, self.most_weight) = (connections, seen.weight);
            self.most = 1;
        } else if this == most {
            self.most = self.most.wrapping_add(1);
        }
    }

    /// Whether every endpoint that may be chosen is avoided, so that none is.
    #[inline(always)]
    pub const fn are_all_avoided(&self) -> bool {
        !self.has_sound && self.has_avoided
    }

    /// Whether this node has lost most of its connections: it has fewer than so many.
    #[inline(always)]
    pub const fn has_lost_most(&self, lost_below: u64) -> bool {
        self.own < lost_below
    }

    /// The level to draw by, the room below it, and how many have none.
    #[inline(always)]
    const fn level_and_room(&self, level: u64) -> (u64, u64, u32) {
        if self.room != 0 {
            return (level, self.room, self.full);
        }
        // In BPF a division by 0 is 0, but here it would be a panic.
        let weight = if self.most_weight == 0 {
            1
        } else {
            self.most_weight
        };
        let most = self.most_connections.wrapping_mul(EndpointGroup::LOAD_ONE) / weight;
        match self.room_of_all(most) {
            0 => {
                let above = most.wrapping_add(EndpointGroup::LOAD_ONE);
                (above, self.room_of_all(above), 0)
            }
            room => (most, room, self.most),
        }
    }

    /// The room below a level that nobody is above.
    #[inline(always)]
    const fn room_of_all(&self, level: u64) -> u64 {
        level
            .wrapping_mul(self.weight)
            .saturating_sub(self.connections.wrapping_mul(EndpointGroup::LOAD_ONE))
    }
}

/// The second walk: whose room the draw falls into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Draw {
    level: u64,
    /// The fewest connections of this node for a weight, where it goes by these alone; else weight
    /// 0.
    fewest: u64,
    fewest_weight: u64,
    /// Room that is still to be passed over.
    left: u64,
    /// Whether avoided endpoints may be chosen.
    avoided_too: bool,
    /// Whether the draw has fallen.
    is_over: bool,
    chosen: u32,
}

impl Draw {
    const NOBODY: u32 = u32::MAX;

    /// The draw of that number of a node whose draws begin at `start` (a fraction of 2³²).
    #[inline(always)]
    pub const fn new(sum: &Sum, level: u64, start: u64, draws: u64) -> Self {
        let (level, room, full) = sum.level_and_room(level);
        let at = point(sum.avoided.wrapping_add(full), start, draws);
        Self {
            level,
            fewest: 0,
            fewest_weight: 0,
            left: fraction(room, at),
            avoided_too: !sum.has_sound,
            is_over: false,
            chosen: Self::NOBODY,
        }
    }

    /// As [`Draw::new`], by this node's own counts alone.
    #[inline(always)]
    pub const fn by_own(sum: &Sum, start: u64, draws: u64) -> Self {
        let left_out = sum.number.wrapping_sub(sum.fewest_number);
        let at = point(sum.avoided.wrapping_add(left_out), start, draws);
        Self {
            level: 0,
            fewest: sum.fewest,
            fewest_weight: sum.fewest_weight,
            left: fraction(sum.fewest_weights, at),
            avoided_too: !sum.has_sound,
            is_over: false,
            chosen: Self::NOBODY,
        }
    }

    /// What an endpoint counts for in the draw.
    #[inline(always)]
    const fn part(&self, seen: &Seen) -> u64 {
        if self.fewest_weight == 0 {
            return seen.room(self.level);
        }
        let is_of_fewest =
            seen.own.wrapping_mul(self.fewest_weight) == self.fewest.wrapping_mul(seen.weight);
        if is_of_fewest { seen.weight } else { 0 }
    }

    /// Looks at one endpoint, in the same order as [`Sum`] did.
    #[inline(always)]
    pub const fn look(&mut self, endpoint: u32, seen: &Seen) {
        if self.is_over || seen.weight == 0 || (seen.avoided && !self.avoided_too) {
            return;
        }
        let room = self.part(seen);
        if room == 0 && self.chosen != Self::NOBODY {
            return;
        }
        // What filled up since the first walk may leave the draw beyond the last one: it is that
        // one then. If nobody has room any more, it is the first.
        self.chosen = endpoint;
        if self.left < room {
            self.is_over = true;
        } else {
            self.left -= room;
        }
    }

    /// Who has it; `None`: nobody may be chosen.
    #[inline(always)]
    pub const fn chosen(&self) -> Option<u32> {
        if self.chosen == Self::NOBODY {
            None
        } else {
            Some(self.chosen)
        }
    }
}

/// Where on the circle of 2³² a draw falls.
///
/// Nodes whose draws fell on an endpoint that does not answer draw again at about the same time,
/// and were all on its part of the circle. Moved on together they would all fall on one endpoint
/// again.
#[inline(always)]
pub const fn point(left_out: u32, start: u64, draws: u64) -> u64 {
    let scattered = start.wrapping_mul(1 + SCATTER * left_out as u64);
    scattered.wrapping_add(draws.wrapping_mul(GOLDEN)) & 0xffff_ffff
}

/// A number times a fraction of 2³², rounded down.
#[inline(always)]
const fn fraction(number: u64, of: u64) -> u64 {
    (number >> 32) * of + (((number & 0xffff_ffff) * of) >> 32)
}

#[cfg(test)]
mod tests;
