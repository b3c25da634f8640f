//! What recovery makes of the batch at a position. (pure)
//!
//! | header valid here | chain and incarnation continue | payloads valid | durable beyond | decision |
//! |---|---|---|---|---|
//! | yes | yes | yes | – | keep |
//! | no  | –   | –   | no  | stop: the torn or unwritten end |
//! | yes | no  | –   | no  | stop: a leftover of an earlier lap or incarnation |
//! | yes | yes | no  | no  | stop: a torn end |
//! | any other |   |   | yes | refuse: durable data is damaged |
//!
//! *Durable beyond*: the super block's checkpoint, or a valid batch further on,
//! says that the journal was durable beyond this position (strictly: equality
//! is an ordinary torn tail, ruling 2). Torn data that no one was promised is cut;
//! damage to durable data is never cut, it is refused (protocol-aware recovery).

/// What was seen at a position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    /// Magic, version, journal, position and header CRC are right.
    pub header: bool,
    /// `prev_crc` matches and the incarnation does not go back.
    pub chain: bool,
    /// All payload CRCs match.
    pub payloads: bool,
    /// Something durable lies beyond.
    pub durable_beyond: bool,
}

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Take the batch and go on behind it.
    Keep,
    /// The log ends here.
    Stop,
    /// Start read-write never; repair from the target.
    Refuse,
}

/// The table above.
pub fn decide(seen: Seen) -> Decision {
    match seen {
        Seen { header: true, chain: true, payloads: true, .. } => Decision::Keep,
        Seen { durable_beyond: true, .. } => Decision::Refuse,
        Seen { .. } => Decision::Stop,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_combination_has_the_decision_of_the_table() {
        let rows: [([Option<bool>; 4], Decision); 5] = [
            ([Some(true), Some(true), Some(true), None], Decision::Keep),
            ([Some(false), None, None, Some(false)], Decision::Stop),
            ([Some(true), Some(false), None, Some(false)], Decision::Stop),
            ([Some(true), Some(true), Some(false), Some(false)], Decision::Stop),
            ([None, None, None, Some(true)], Decision::Refuse),
        ];
        for bits in 0..16u8 {
            let bit = |i: u8| bits & (1 << i) != 0;
            let seen =
                Seen { header: bit(0), chain: bit(1), payloads: bit(2), durable_beyond: bit(3) };
            let fits = |row: &[Option<bool>; 4]| {
                (0..4).all(|i| row[usize::from(i)].is_none_or(|want| want == bit(i)))
            };
            let first = rows.iter().find(|(row, _)| fits(row)).expect("a row fits");
            assert_eq!(decide(seen), first.1, "{seen:?}");
        }
    }
}
